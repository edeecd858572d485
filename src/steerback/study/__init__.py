"""The pipeline that generates and judges responses (`pipeline`), and the stages before a measurement (`study`)."""
