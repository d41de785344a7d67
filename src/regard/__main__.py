"""`python -m regard`, which `accelerate launch -m regard` and torchrun need."""

from regard.cli import main

if __name__ == "__main__":
    main()
