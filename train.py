"""Start a run.

python train.py
python train.py --config configs/fast.yaml --model.lr 0.01 --run_name first
"""

from collections.abc import Sequence

from savepoint import entry


def main(argv: Sequence[str]) -> int:
    from savepoint import precheck

    precheck.check(argv)  # answers --help; says what is wrong with flags and files before the slow imports

    with entry.importing():
        import project  # noqa: F401  (its classes can be named shortly in a config)
        from savepoint.resume import start

    return start(argv)


if __name__ == "__main__":
    entry.run(main, __file__)
