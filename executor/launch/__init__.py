"""Where workers run: ``local.py`` starts them on this machine under torch elastic."""
