"""Does the fitted encoder compute what the pre-trained one computes?"""
