"""Colors of classes, the same in every image that is drawn of a dataset."""

import colorsys


def palette(number: int) -> list[tuple[int, int, int]]:
    """Return colors (R, G, B in 0 to 255) that are far apart; a class has the same color among any number of them."""
    hues = [(0.02 + i * 0.618034) % 1 for i in range(number)]
    values = [colorsys.hsv_to_rgb(hue, 0.85, (0.95, 0.7)[i // 7 % 2]) for i, hue in enumerate(hues)]
    return [(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in values]
