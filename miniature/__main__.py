"""The command `python -m miniature claims`; see claims.py."""

from miniature.claims import main

if __name__ == "__main__":
    main()
