"""Small trainings of many kinds, as strangers write them: the SHAPES of each module, by name."""
