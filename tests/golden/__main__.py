"""`python -m tests.golden --format x`: writes the golden file of a format that has none."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # as pytest has it, by `pythonpath` in pyproject.toml

from comfyui_quantpress.quant_core.errors import RequestError  # noqa: E402 - after the path
from comfyui_quantpress.quant_core.formats import get_format  # noqa: E402
from golden_file import golden_path, write  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.golden",
        description="Writes the golden file of a new format: corner weights, and the bytes that its encoder stores "
        "for them. A file that exists is never overwritten.",
    )
    parser.add_argument(
        "--format", required=True, metavar="NAME", help="the format's name, as `quantpress quantize --format` takes it"
    )
    name = parser.parse_args().format
    try:
        fmt = get_format(name)
        path = write(fmt)
    except RequestError as err:
        parser.error(str(err))
    except FileExistsError:
        parser.error(
            f"{golden_path(fmt)} exists, and is not overwritten: files written by earlier versions hold those bytes. "
            "If the bytes are to change, delete the file first and say in the commit why."
        )
    print(
        f"Wrote {path}. Say in each block's `why` what the bytes must be by the format's definition, and check them."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
