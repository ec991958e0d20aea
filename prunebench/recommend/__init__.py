"""Find the cheapest configuration of a model that holds a floor of quality on a user's text."""
