"""Start a run.

python train.py
python train.py --config configs/fast.yaml --model.lr 0.01 --run_name first
"""

from collections.abc import Sequence

from savepoint import entry


def main(argv: Sequence[str]) -> int:
    from savepoint.config import quick

    # Answers --help; says what is wrong with files before the slow imports.
    composed = quick.check(argv)

    with entry.importing():
        import project  # noqa: F401  (its classes can be named shortly in a config)
        from savepoint.resume.start import start

    return start(composed)


if __name__ == "__main__":
    entry.run(main, __file__, default_config="configs/mnist.yaml")
