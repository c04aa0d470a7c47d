"""What a compiled program moves over the links between devices, from its text.

Bytes are those that one device sends, at least: of a result of s bytes on n devices an all-gather
sends s (n-1)/n, an all-reduce 2 s (n-1)/n, a reduce-scatter s (n-1), an exchange (all-to-all)
s (n-1)/n and a permutation s. A ragged exchange counts as if the smaller of what it takes and of
what it gives were full. libtpu writes a reduce-scatter as a computation %all-reduce-scatter, an
all-reduce and a slice of its result.
"""

import collections
import dataclasses
import math
import re

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "ragged-all-to-all", "all-to-all",
    "collective-permute",
)  # fmt: skip
_WIDTHS = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8}
_OPENED = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_SEVERAL = re.compile(r"(?:branch|called)_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_MADE = re.compile(r"%?([\w.\-]+) = (\S+\[[\d,]*\])")
_SCATTERED = re.compile(r"ROOT \S+ = (\w+\[[\d,]*\])")
_MOVED = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")


@dataclasses.dataclass(frozen=True)
class Moved:
    """One collective.

    Attributes:
        kind: one of `KINDS`.
        shapes: of its results on one device, such as "bf16[8,7168]".
        devices: that take part together.
        times: it runs, by the trip counts that the program knows.
        looped: whether it is in a loop.
    """

    kind: str
    shapes: tuple[str, ...]
    devices: int
    times: int
    looped: bool

    @property
    def sent(self) -> float:
        """Bytes that one device sends, all times together."""
        n, size = self.devices, _total(self.shapes)
        share = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1}
        return self.times * size * share.get(self.kind, (n - 1) / n)


def computations(text: str) -> tuple[str, dict[str, list[str]]]:
    """The entry of a compiled module, and the lines of all its computations."""
    lines: dict[str, list[str]] = collections.defaultdict(list)
    inside = entry = ""
    for line in text.splitlines():
        if opened := _OPENED.match(line):
            inside = opened[1]
            entry = inside if line.startswith("ENTRY") else entry
        lines[inside].append(line)
    return entry, lines


def called(line: str) -> list[str]:
    """Computations that an operation calls."""
    names = _CALLED.findall(line)
    for several in _SEVERAL.findall(line):
        names += [one.strip().lstrip("%") for one in several.split(",")]
    return names


def collectives(text: str, devices: int) -> list[Moved]:
    """All collectives of a compiled module that runs on so many devices."""
    sizes = {made[1]: (made[2],) for made in map(_MADE.search, text.splitlines()) if made}
    entry, lines = computations(text)
    found = []

    def walk(name, times, looped):
        for line in lines.get(name, ()):
            moved = _MOVED.search(line)
            if moved:
                shapes = _results(moved[1], moved[2], bool(moved[3]))
                if moved[2] == "ragged-all-to-all":
                    taken = line[moved.end() :].split(",")[0].split()[-1].lstrip("%")
                    shapes = min((shapes, sizes.get(taken, shapes)), key=_total)
                kind, count = moved[2], _group(line, devices)
                if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                    kind, shapes = "reduce-scatter", _kept(lines[name])
                if count > 1 and shapes:
                    found.append(Moved(kind, shapes, count, times, looped))
                continue
            loop = " while(" in line
            trips = int(known[1]) if loop and (known := _TRIPS.search(line)) else 1
            for one in called(line):
                walk(one, times * trips, looped or loop)

    walk(entry, 1, False)
    return found


def by_kind(moved: list[Moved]) -> dict[str, tuple[int, float]]:
    """{kind: (how many, bytes sent)}."""
    table: dict[str, tuple[int, float]] = {}
    for one in moved:
        count, sent = table.get(one.kind, (0, 0.0))
        table[one.kind] = count + one.times, sent + one.sent
    return table


def _total(shapes: tuple[str, ...]) -> int:
    return sum(map(_bytes, shapes))


def _bytes(shape: str) -> int:
    kind, sizes = re.fullmatch(r"(\w+)\[([\d,]*)\]", shape).groups()  # pyrefly: ignore
    width = _WIDTHS.get(kind) or max(1, int(re.sub(r"\D", "", kind[1:3]) or 8) // 8)
    return width * math.prod(int(size) for size in sizes.split(",") if size)


def _results(result: str, kind: str, started: bool) -> tuple[str, ...]:
    """The arrays that a collective makes; what is started names its operands before them."""
    parts = re.findall(r"\w+\[[\d,]*\]", result)
    if not started or kind == "all-reduce":
        return tuple(parts)
    parts = [part for part in parts if part != "u32[]"]
    return tuple(parts[len(parts) // 2 :])


def _kept(lines: list[str]) -> tuple[str, ...]:
    """The array that a computation ends in."""
    return tuple(root[1] for root in map(_SCATTERED.search, lines) if root)


def _group(line: str, devices: int) -> int:
    """How many devices of a collective take part together."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(axis.split("=") for axis in named[1].split(","))
        return math.prod(int(sizes[axis.strip()]) for axis in named[2].split(","))
    if several := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):
        return int(several[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    if "source_target_pairs=" in line:
        return 2
    return devices
