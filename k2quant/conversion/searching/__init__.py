"""Better scales than rounding's: what statistics must fit, who searches, and what it bought."""
