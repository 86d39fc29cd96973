"""The models of the user: their pools, their forwards under way, and what their results depend on."""
