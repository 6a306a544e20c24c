"""What noised sums of a fleet's rows say: ridge regression, means and variances, histograms, quantiles.

estimates   a query's integers back to real numbers, with their standard errors
ridge       linear regression from a noised Gram matrix (AdaSSP)
quantiles   quantiles from a noised dyadic histogram
"""
