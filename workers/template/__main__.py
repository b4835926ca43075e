"""`fmzbus new-venue NAME`: a venue of one's own, and its test, ready to run."""

import argparse
import importlib.util
import keyword
import re
import sys
from pathlib import Path

from workers.venues import VENUES

HERE = Path(__file__).parent
NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")


class Refused(Exception):
    """Nothing was written; the text says why."""


def class_name(name: str) -> str:
    """my_exchange -> MyExchange."""
    return "".join(part.capitalize() for part in name.split("_"))


def write(name: str, folder: Path) -> list[Path]:
    """Write NAME.py and test_NAME.py; both or, where one of them is there already, none. Raises Refused."""
    if not NAME.fullmatch(name) or keyword.iskeyword(name) or keyword.issoftkeyword(name):
        raise Refused(f"{name!r}: expected a lower-case Python identifier of at most 63 letters, digits and _, such as my_exchange")
    if name in VENUES:
        raise Refused(f"{name}: there is a venue of that name; take another one")
    if not folder.is_dir():
        raise Refused(f"{folder}: no such folder")
    contents = {
        folder / f"{name}.py": (HERE / "venue.py").read_text(),
        folder / f"test_{name}.py": (HERE / "test_venue.py").read_text().replace("workers.template.venue", name),
    }
    for path in contents:
        if path.exists():
            raise Refused(f"{path} is there already; nothing was written")
    if name in sys.builtin_module_names or importlib.util.find_spec(name) is not None:
        raise Refused(f"{name}: Python has a module of that name, which would be found in its place; take another name")
    for path, text in contents.items():
        with path.open("x") as file:
            file.write(text.replace("MyExchange", class_name(name)))
    return list(contents)


def main() -> None:
    parser = argparse.ArgumentParser(prog="fmzbus new-venue", description="Write a venue of your own, and its test; both run as they are.")
    parser.add_argument("name", metavar="NAME", help="of the file and of the exchange in service addresses: a lower-case identifier")
    parser.add_argument("--dir", type=Path, default=Path(), help="an existing folder; default the present one")
    args = parser.parse_args()
    try:
        venue, test = write(args.name, args.dir)
    except (Refused, OSError) as e:
        sys.exit(f"fmzbus: {e}")
    sys.stdout.write(f"""wrote {venue} and {test}; they speak the paper exchange's API until you change them. Next:

  fmzbus check-venue {venue}   # what is right and wrong, and where to look; again after each CHANGE
  pytest {test}   # the same as a test

Then let fmzbus, started in {"the same folder" if args.dir == Path() else args.dir}, serve it. In fmzbus.toml:

  [venues.{args.name}]
  class = "{args.name}:{class_name(args.name)}"
  base_url = "https://..."

  fmzbus up
  fmzbus call {args.name} ticker symbol=BTC_USDT
""")


if __name__ == "__main__":
    main()
