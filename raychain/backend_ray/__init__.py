"""Everything that touches Ray: sessions, worker groups, actors, tasks, metrics. No other package imports `ray`."""
