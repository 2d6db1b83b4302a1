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


def carry_levels(extent: int, max_position: int, base: int) -> list[int]:
    """Returns the powers of the base whose multiples a window rarely holds: above its extent, below the number of positions.

    Args:
      extent: last position of a window minus its first.
      max_position: positions are below.
      base: base of the digits.
    """
    return [power for n in range(1, count_digits(max_position, base)) if (power := base**n) > extent]
