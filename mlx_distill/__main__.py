"""`python -m mlx_distill` is `mlx-distill`."""

from mlx_distill.cli.main import main

if __name__ == "__main__":
    main(prog_name="mlx-distill")
