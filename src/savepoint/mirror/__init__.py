"""A copy of a run in the cloud, made while it trains. Local first: nothing here stands in a save's
way.

    <checkpoint.mirror>/<run name>/       laid out as the run directory, so that a copy of it is one
      run.json, config.yaml, metrics.csv  from before the checkpoints, so that no row is missing
      checkpoints/step-00000430.ckpt      as on the disk, byte for byte
      summary.json                        at the end
      lease.json                          of the one process that uploads

Invariants: an object gets its name whole; a checkpoint exists in a mirror if and only if it
verifies, as on a disk; of a run's keys only checkpoints that say its id are deleted, and never the
one that it was resumed from.
"""
