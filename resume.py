"""Continue a run from its checkpoint alone.

python resume.py
python resume.py outputs/first --trainer.max_epochs 20
"""

from collections.abc import Sequence

from savepoint import entry


def main(argv: Sequence[str]) -> int:
    from savepoint.resume.request import requested

    request = requested(argv)  # a missing or damaged checkpoint is said before the slow imports
    if request is None:
        return 0

    with entry.importing():
        import project  # noqa: F401  (its classes can be named shortly in a config)
        from savepoint.resume.start import resume

    return resume(request)


if __name__ == "__main__":
    entry.run(main, __file__)
