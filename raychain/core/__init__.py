"""What every other package may use: process groups. Nothing here knows pictures, models or Ray."""
