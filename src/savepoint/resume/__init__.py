"""How a run goes on: the request, its checkpoint, the comparison, the restored training."""
