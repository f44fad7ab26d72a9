"""Colors of classes and objects, the same wherever they are drawn."""

import colorsys


def color_of(label: int) -> tuple[int, int, int]:
    """Return a color (R, G, B in 0 to 255) for a class or an object; neighboring numbers differ most."""
    hue = (0.02 + label * 0.6180339887) % 1  # the golden ratio
    red, green, blue = colorsys.hsv_to_rgb(hue, (0.85, 0.6)[label // 7 % 2], (1.0, 0.8)[label // 14 % 2])
    return round(255 * red), round(255 * green), round(255 * blue)


def palette(number: int) -> list[tuple[int, int, int]]:
    """Return the colors of `number` classes."""
    return [color_of(label) for label in range(number)]
