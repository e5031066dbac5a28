"""Draw all pictures of the docs: python -m docs.draw [folder] [svg or png]."""

import sys
from pathlib import Path

from docs.draw import PICTURES
from docs.draw.canvas import settings, write

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/pictures")
kind = sys.argv[2] if len(sys.argv) > 2 else "svg"
folder.mkdir(parents=True, exist_ok=True)
with settings():
    for name, picture in PICTURES.items():
        data = picture.data()
        write(picture.draw(data), data, folder / f"{name}.{kind}")
