"""What the synthetic screens say: labels, values, options and buttons."""

from __future__ import annotations

from random import Random

NAMES = (
    "Anna Ben Carla David Emma Felix Grace Henry Irene Jonas "
    "Karin Liam Maria Noah Olga Paul Rosa Simon Tina Victor"
)
SURNAMES = (
    "Adams Brown Clark Davis Evans Fisher Green Hall Jones "
    "King Lopez Miller Nolan Owens Price Reed Stone Weber"
)
CITIES = (
    "Berlin Boston Cairo Delhi Geneva Havana Kyoto Lagos Lima "
    "London Madrid Milan Oslo Paris Porto Quito Rome  Seoul"
)
COLORS = "red blue green black white gray orange purple brown pink"
STATES = "open paid sent late new done draft void ready hold"
ITEMS = "Lamp Chair Desk Phone Cable Mouse Paper Ink Clock Shelf Table Screen Bag Pen Cup Fan Lock Tape Board Drill"
LANGUAGES = "English German French Spanish Italian Dutch Polish Greek Danish Czech"
OPTIONS = [
    "Wi-Fi",
    "Bluetooth",
    "Dark mode",
    "Sound",
    "Location",
    "Updates",
    "Sync",
    "Backup",
    "Camera",
    "VPN",
    "Hotspot",
    "Captions",
    "Zoom",
    "Auto save",
    "Alerts",
    "Night light",
    "Cookies",
    "Sharing",
    "Spelling",
    "Preview",
    "Ruler",
    "Grid",
    "Signing",
    "Mute",
]
BUTTONS = [
    "OK",
    "Cancel",
    "Save",
    "Open",
    "Print",
    "Apply",
    "Close",
    "Next",
    "Back",
    "Delete",
    "Send",
    "Reply",
    "Search",
    "Login",
    "Help",
    "Export",
    "Copy",
    "Paste",
    "Undo",
    "Share",
    "Start",
    "Stop",
    "Reset",
    "Edit",
]
TITLES = [
    "Inbox",
    "Report",
    "Files",
    "Notes",
    "Editor",
    "Settings",
    "Orders",
    "Photos",
    "Music",
    "Mail",
    "Budget",
    "Tasks",
    "Player",
    "Console",
    "Setup",
]
COLUMNS = ("Qty", "Price", "Stock", "Code")


def money(rng: Random) -> str:
    """An amount such as $1240.50."""
    return f"${rng.choice((rng.randint(1, 99), rng.randint(100, 4999)))}.{rng.choice(('00', '50', '25', '99', '10'))}"


def code(rng: Random) -> str:
    """A reference such as K4-2071."""
    return f"{rng.choice('ABCDEFHKLMNPRSTX')}{rng.randint(1, 9)}-{rng.randint(1000, 9999)}"


def date(rng: Random) -> str:
    """A date such as 2024-03-17."""
    return f"20{rng.randint(10, 39)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"


def _pick(words: str):  # type: ignore[no-untyped-def]
    choices = words.split()
    return lambda rng: rng.choice(choices)


_name, _surname, _city, _state, _color = (_pick(w) for w in (NAMES, SURNAMES, CITIES, STATES, COLORS))

# label -> how its value is drawn
FIELDS = {
    "Name": lambda rng: f"{_name(rng)} {_surname(rng)}",
    "Customer": lambda rng: f"{_name(rng)} {_surname(rng)}",
    "Contact": _name,
    "City": _city,
    "From": _city,
    "Status": _state,
    "Color": _color,
    "Total": money,
    "Amount": money,
    "Tax": money,
    "Balance": money,
    "Date": date,
    "Due": date,
    "Order": lambda rng: str(rng.randint(1000, 99999)),
    "Invoice": code,
    "Code": code,
    "Phone": lambda rng: f"{rng.randint(200, 999)}-{rng.randint(1000, 9999)}",
    "Room": lambda rng: str(rng.randint(1, 499)),
    "Seat": lambda rng: f"{rng.randint(1, 60)}{rng.choice('ABCDEF')}",
    "Item": _pick(ITEMS),
    "Weight": lambda rng: f"{rng.randint(1, 99)} kg",
}
SETTINGS = {
    "Volume": lambda rng: str(rng.randint(0, 100)),
    "Language": _pick(LANGUAGES),
    "Theme": _color,
    "Timeout": lambda rng: f"{rng.randint(1, 60)} min",
    "Device": lambda rng: f"{_name(rng)}-{rng.randint(1, 99)}",
    "Brightness": lambda rng: f"{rng.randint(0, 100)}%",
    "Region": _city,
}
CELLS = {
    "Qty": lambda rng: str(rng.randint(1, 99)),
    "Price": money,
    "Stock": lambda rng: str(rng.randint(0, 999)),
    "Code": code,
}
