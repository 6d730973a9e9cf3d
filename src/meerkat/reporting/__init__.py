"""Journal → pictures and one self-contained page. Needs the extra `report`."""
