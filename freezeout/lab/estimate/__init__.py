"""`freezeout estimate`: what a FreezeOut run will cost and save, before it is made."""
