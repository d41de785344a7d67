"""The items of three published checklists, and which of them a run can answer.

Each item has its published number and its topic in short; the authoritative wording is that of the
publications. If a run knows an answer, the third part names it, see `methods.answers`.

- CLAIM 2024: Tejani et al., Radiology: Artificial Intelligence 2024, 6(4): e240300,
  doi 10.1148/ryai.240300; items as in rsna.github.io/claim.
- STARD-AI: Sounderajah et al., Nature Medicine 2025, 31: 3283-3289, doi 10.1038/s41591-025-03953-8.
- TRIPOD+AI: Collins et al., BMJ 2024, 385: e078378, doi 10.1136/bmj-2023-078378, version of
  11 January 2024.
"""

Item = tuple[str, str, str]

SOURCES = {
    "CLAIM 2024": "Tejani et al., Radiol Artif Intell 2024;6(4):e240300, doi 10.1148/ryai.240300.",
    "STARD-AI": "Sounderajah et al., Nat Med 2025;31:3283–3289, doi 10.1038/s41591-025-03953-8.",
    "TRIPOD+AI": "Collins et al., BMJ 2024;385:e078378, doi 10.1136/bmj-2023-078378.",
}

_CLAIM = """
1|AI methodology and category of technology in title or abstract|technology
2|Abstract: summary of design, methods, results, conclusions|
3|Background, intended use and role of the AI approach|
4|Aims, objectives and hypotheses|
5|Prospective or retrospective study|
6|Study goal|
7|Data sources|data
8|Inclusion and exclusion criteria|
9|Data pre-processing|preprocessing
10|Selection of data subsets|subsets
11|De-identification methods|
12|How missing data were handled|missing
13|Image acquisition protocol|
14|Definition of the method used to obtain the reference standard|
15|Rationale for choosing the reference standard|
16|Source of reference standard annotations|
17|Annotation of test set|
18|Inter- and intra-rater variability of the annotators|
19|How data were assigned to partitions|splits
20|Level at which partitions are disjoint|level
21|Intended sample size|
22|Detailed description of model|model
23|Software libraries, frameworks and packages|software
24|Initialization of model parameters|initialization
25|Details of training approach|training
26|Method of selecting the final model|selection
27|Ensembling techniques|ensembling
28|Metrics of model performance|metrics
29|Statistical measures of significance and uncertainty|intervals
30|Robustness or sensitivity analysis|
31|Methods for explainability or interpretability|explanations
32|Evaluation on internal data|internal
33|Testing on external data|
34|Clinical trial registration|
35|Numbers of patients or examinations included and excluded|numbers
36|Demographic and clinical characteristics of cases in each partition|
37|Performance metrics and measures of statistical uncertainty|results
38|Estimates of diagnostic performance and their precision|diagnostic
39|Failure analysis of incorrect results|failures
40|Study limitations|
41|Implications for practice, intended use, clinical role|
42|Reference to the full study protocol or additional technical details|
43|Availability of software, trained model and data|availability
44|Sources of funding and other support; role of funders|
"""

_STARD = """
1|Title: AI diagnostic accuracy study, with a measure of accuracy|
2|Abstract: structured summary|
3|Background, intended use and clinical role of the index test|
4|Objectives and hypotheses|
5|Study design: prospective or retrospective|
6|Ethics approval|
7|Eligibility criteria of participants and of data|
8|How potentially eligible participants were identified|
9|Setting, location and dates|
10|Consecutive, random or convenience series|
11|Source of the data|data
12|Annotation of the data set|
13|Devices and software of data capture|
14|Data acquisition and pre-processing|preprocessing
15a|Index test, in detail|model
15b|How the index test was developed: training, validation and test data|development
15c|Test positivity cut-offs of the index test, pre-specified or exploratory|threshold
15d|End users of the index test and their expertise|
16a|Reference standard, in detail|
16b|Rationale for choosing the reference standard|
16c|Cut-offs of the reference standard|
17a|Whether readers of the index test knew clinical information and the reference standard|
17b|Whether assessors of the reference standard knew the index test|
18|Methods for estimating or comparing diagnostic accuracy|intervals
19|Handling of indeterminate results|
20|Handling of missing data|missing
21|Analyses of variability in diagnostic accuracy|parts
22|Intended sample size and how it was determined|
23|How performance error and algorithmic bias and fairness were assessed|parts
24|Flow of participants, with a diagram|
25|Baseline characteristics of training, validation and test data|counts
26a|Distribution of severity of disease in those with the target condition|
26b|Distribution of alternative diagnoses in those without it|
27|Time interval between index test and reference standard|
28|Whether the test data represent the intended population|
29|Differences between development and external evaluation data|
30|Cross tabulation of the index test by the reference standard|table
31|Estimates of diagnostic accuracy and their precision|diagnostic
32|Adverse events|
33|Study limitations|
34|Implications for practice and clinical role|
35|Ethical considerations and fairness|
36|Registration number and registry|
37|Where the full study protocol can be accessed|
38|Sources of funding and role of funders|
39|Commercial interests|
40a|Availability of data sets and code|availability
40b|Whether outputs are stored, auditable and available for evaluation|outputs
"""

_TRIPOD = """
1|Title|
2|Abstract|
3a|Background: healthcare context and rationale|
3b|Background: target population, intended purpose and users|
3c|Background: known health inequalities|
4|Objectives|
5a|Data: sources, rationale, representativeness|
5b|Data: dates|
6a|Participants: study setting, number and location of centers|
6b|Participants: eligibility criteria|
6c|Participants: treatments received|
7|Data preparation: pre-processing and quality checking|preprocessing
8a|Outcome: definition, assessment, rationale|
8b|Outcome: qualifications of assessors|
8c|Outcome: blinding of assessment|
9a|Predictors: choice and pre-selection|
9b|Predictors: definition and measurement|predictors
9c|Predictors: qualifications of assessors|
10|Sample size|
11|Missing data|missing
12a|Analytical methods: how the data were used and partitioned|splits
12b|Analytical methods: how predictors were handled|preprocessing
12c|Analytical methods: model type, rationale, building steps, internal validation|building
12d|Analytical methods: heterogeneity across clusters|
12e|Analytical methods: measures and plots of performance|metrics
12f|Analytical methods: model updating|updating
12g|Analytical methods: how predictions were calculated|predictions
13|Class imbalance|imbalance
14|Fairness|
15|Model output: probabilities, classification, thresholds|threshold
16|Training versus evaluation: differences between the data|
17|Ethical approval|
18a|Open science: funding|
18b|Open science: conflicts of interest|
18c|Open science: protocol|
18d|Open science: registration|
18e|Open science: data sharing|
18f|Open science: code sharing|availability
19|Patient and public involvement|
20a|Participants: flow, numbers with and without the outcome|counts
20b|Participants: characteristics|
20c|Participants: comparison with the development data|
21|Model development: participants and outcome events in each analysis|counts
22|Model specification: the full model|availability
23a|Model performance: estimates with intervals, also of key subgroups|results
23b|Model performance: heterogeneity across clusters|parts
24|Model updating: results|calibration
25|Interpretation|
26|Limitations|
27a|Usability: poor or unavailable input data|
27b|Usability: interaction and expertise of users|
27c|Usability: next steps for research|
"""


def _items(text: str) -> list[Item]:
    return [tuple(line.split("|")) for line in text.strip().splitlines()]  # type: ignore[misc]


CHECKLISTS: dict[str, list[Item]] = {
    "CLAIM 2024": _items(_CLAIM), "STARD-AI": _items(_STARD), "TRIPOD+AI": _items(_TRIPOD),
}  # fmt: skip
"""(number, topic, name of the answer or "") for each item."""
