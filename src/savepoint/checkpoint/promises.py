"""What a resume promises, by the processes it has: the same sentences in the plan, in manifests, in
`show` and in docs/clusters.md. Standard library only.
"""

SAME_SAMPLES = "same samples"
SAME_BITS = "same bits"

AS_MANY = "on as many processes: the same bits"
ELSEWHERE = {
    SAME_SAMPLES: (
        "on another number of processes: the same samples and rates at each step, added up in "
        "another order (data.global_batch_size)"
    ),
    SAME_BITS: (
        "on another number of processes: the same bits of weights and optimizers "
        "(trainer.strategy elastic_ddp)"
    ),
}
"""By what a manifest says under `elastic`; one that says nothing promises nothing elsewhere."""
