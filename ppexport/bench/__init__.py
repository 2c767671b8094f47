"""``ppexport bench``: measure a bundle, compare two measurements, report them."""
