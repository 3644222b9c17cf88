"""Projects that begin as a thin copy of the template: how one is made, and gets a newer library."""
