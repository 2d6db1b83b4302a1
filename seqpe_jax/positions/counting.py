"""Numbers of digits of positions, without JAX, so that configs are checked without importing it."""


def count_digits(max_position: int, base: int) -> int:
    """Returns the number of digits of the largest position, max_position - 1; at least 1."""
    digits = 1
    while base**digits < max_position:
        digits += 1
    return digits


def largest_position(digits: int, base: int) -> int:
    """Returns the largest coordinate that `digits` digits represent."""
    return base**digits - 1
