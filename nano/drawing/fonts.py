"""Font files for drawn signs, in two parts that share no family: for training, and held out for testing.

The pip packages of the extra `nano` bring 12 families for training and 5 for testing; fonts of the system (Debian's
`fonts-*` packages) join those for training.
"""

import functools
import re
from importlib.metadata import entry_points
from pathlib import Path

import matplotlib
from PIL import ImageFont

HELD_OUT = ("Lato", "Caladea", "HankenGrotesk", "Manrope", "DejaVuSerif", "Carlito")  # the last copies Lato
SYSTEM = Path("/usr/share/fonts")
SUFFIXES = (".ttf", ".otf")
# Symbols, formulas, hairlines, scripts, and capitals that cannot be told apart.
UNFIT = re.compile(
    r"Thin|Hairline|ExtraLight|Light$|Symbol|Math|Script|Initial|^cm(ex|mi|sy)|^STIX(Non|Siz)|LastResort|Fallback"
    r"|^(Z003|D050000L|texgyrechorus|LinBiolinum_K|LinLibertine_I|OCRBX|LobsterTwo|lobster|DejaVu.*Display)"
    r"|^font_awesome|FontAwesome|Variable|\["
    r"|^(Blankenburg|Caliban|Cupola|Domestic|Ecolier|El_Abogado|Isabella|It_wasn|Junkyard|OCRB[EF]|Oldania)"
    r"|^(PenguinAttack|StayPuft|Wargames|f500|femkeklaver)"
)
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
MEASURED_AT = 100  # pixels


def family_of(path: Path) -> str:
    """The family by the file's name: what stands before the style."""
    name = re.split(r"[-_ ]", path.stem)[0]
    return re.sub(r"(Bold|Italic|Regular|Oblique|Condensed|Bol|Ita)+$", "", name) or path.stem


@functools.cache
def families(held_out: bool) -> dict[str, tuple[str, ...]]:
    """Font files by family, of the training part or of the held-out part."""
    found: dict[str, list[str]] = {}
    for path in sorted(package_fonts() + (() if held_out else system_fonts()), key=lambda path: path.name):
        family = family_of(path)
        if not UNFIT.search(path.stem) and (family in HELD_OUT) == held_out and is_complete(str(path)):
            found.setdefault(family, []).append(str(path))
    return {family: tuple(files) for family, files in found.items()}


def package_fonts() -> tuple[Path, ...]:
    """Files of the installed font packages, and those that matplotlib brings."""
    files = [
        path
        for group in ("fonts_ttf", "fonts_otf")
        for entry in entry_points(group=group)
        for path in entry.load().values()
    ]
    return (*map(Path, files), *Path(matplotlib.get_data_path(), "fonts", "ttf").glob("*.ttf"))


def system_fonts() -> tuple[Path, ...]:
    return tuple(path for path in SYSTEM.rglob("*") if path.suffix.lower() in SUFFIXES)


def is_complete(path: str) -> bool:
    """Whether the font can be opened and draws all characters, each in its own way."""
    try:
        font = open_font(path, 24)
        return len({bytes(font.getmask(character)) for character in CHARACTERS}) >= len(CHARACTERS) - 2
    except OSError:
        return False


@functools.lru_cache(4096)
def open_font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def cap_ratio(path: str) -> float:
    """Height of a capital over the font's size."""
    _, top, _, bottom = open_font(path, MEASURED_AT).getbbox("H")
    return (bottom - top) / MEASURED_AT
