"""The timeline of a pipeline schedule as SVG: a row for each rank, a box for each action, its micro-batch inside."""

from xml.sax.saxutils import escape

from megacpt.parallel.pipeline.simulate import Simulation

_HUES = {"F": 210, "B": 130, "I": 170, "W": 60}
_NAMES = {"F": "forward", "B": "backward", "I": "backward for the input", "W": "backward for the weights"}
_ROW, _LEFT, _TOP = 26, 70, 50


def schedule_picture(title: str, simulation: Simulation, placement: tuple[int, ...]) -> str:
    """An SVG document. Virtual stages of a rank differ in lightness."""
    unit = max(6.0, min(24.0, 1800 / simulation.time))
    ranks = len(simulation.spans)
    width, height = _LEFT + simulation.time * unit + 20, _TOP + ranks * _ROW + 40
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="white"/>',
        f'<text x="10" y="20" font-size="14">{escape(title)}</text>',
        f'<text x="10" y="38">bubble {simulation.bubble:.1%} of the busy time, peak stage activations by rank '
        f"{', '.join(map(str, simulation.peak))}</text>",
    ]
    for rank, spans in enumerate(simulation.spans):
        y = _TOP + rank * _ROW
        mine = [stage for stage, owner in enumerate(placement) if owner == rank]
        out.append(f'<text x="10" y="{y + 16}">rank {rank}</text>')
        for action, begin, end in spans:
            light = 55 + 35 * mine.index(action.stage) / max(1, len(mine) - 1) if len(mine) > 1 else 70
            x, wide = _LEFT + begin * unit, (end - begin) * unit
            number = action.micro_batch if wide >= 8 * len(str(action.micro_batch)) else ""
            out.append(
                f"<g><title>{_NAMES[action.kind]}, stage {action.stage}, micro-batch {action.micro_batch}</title>"
                f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{_ROW - 4}" stroke="white" '
                f'fill="hsl({_HUES[action.kind]},60%,{light:.0f}%)"/>'
                f'<text x="{x + wide / 2:.1f}" y="{y + 15}" text-anchor="middle">{number}</text></g>'
            )
    x, y = _LEFT, _TOP + ranks * _ROW + 20
    for kind in sorted({action.kind for spans in simulation.spans for action, _, _ in spans}, key="FBIW".index):
        out.append(f'<rect x="{x}" y="{y - 10}" width="12" height="12" fill="hsl({_HUES[kind]},60%,70%)"/>')
        out.append(f'<text x="{x + 16}" y="{y}">{_NAMES[kind]}</text>')
        x += 40 + 7 * len(_NAMES[kind])
    return "\n".join([*out, "</svg>"]) + "\n"
