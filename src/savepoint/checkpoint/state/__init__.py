"""What is saved beyond Lightning's own, and put back where nothing is half done. No files.

All of it is plain values and tensors, so that `weights_only=True` reads it. Lightning's private
names, of 2.6, stand in this package and nowhere else.
"""
