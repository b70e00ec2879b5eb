"""UltraEdit inside other software; every integration imports its host lazily."""
