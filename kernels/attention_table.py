def library_for(*a): return None
