"""Parts of a run that has been, trained again from its checkpoints: in a directory beside it, which
the run knows nothing of.
"""
