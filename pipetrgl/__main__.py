"""`python -m pipetrgl` is `pipetrgl`; torchrun starts the workers this way."""

from pipetrgl.cli import main

if __name__ == "__main__":
    main()
