"""How many digits positions take; plain numbers, so that a config is read without JAX."""


def count_digits(max_position: int, base: int) -> int:
    """Returns the digits of the largest position, max_position - 1, in a base (at least 1)."""
    digits = 1
    while base**digits < max_position:
        digits += 1
    return digits


def largest_position(digits: int, base: int) -> int:
    """Returns the largest coordinate that so many digits can write."""
    return base**digits - 1
