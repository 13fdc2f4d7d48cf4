"""Live monitoring of runs in the Dask dashboard: what drivers tell, what the scheduler keeps, and the pages."""
