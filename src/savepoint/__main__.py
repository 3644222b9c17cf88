"""`python -m savepoint` is the `savepoint` command."""

from savepoint.commands import main

raise SystemExit(main())
