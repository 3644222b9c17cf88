"""What a training changes in its objects, found by looking at them: torch and torchmetrics, no
checkpoint and no training.
"""
