"""Small trainings of many kinds, as strangers write them: each module's SHAPES maps names to them."""
