"""The search as Ray Tune runs it: a searcher, a scheduler and a callback of Tune's, each around any of Tune's own."""
