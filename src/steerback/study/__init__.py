"""The one loop over responses (`pipeline`) and what comes before a measurement (`study`)."""
