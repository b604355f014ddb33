"""The program that ``lastgood demo`` trains, kills and resumes. Needs the extra ``demo``."""
