"""python -m s1fast"""

from s1fast.cli import main

if __name__ == "__main__":
    main()
