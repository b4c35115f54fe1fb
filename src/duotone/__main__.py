"""`python -m duotone`, which is `duotone`: `torchrun --nproc-per-node 2 -m duotone train`."""

from duotone.cli.main import main

if __name__ == "__main__":
    main()
