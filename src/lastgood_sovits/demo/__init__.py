"""What ``lastgood sovits demo`` trains: a small experiment of real speech."""
