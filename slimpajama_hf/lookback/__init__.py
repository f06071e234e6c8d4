"""A run that is over, asked again: verified, rewound, compared, inspected, searched."""
