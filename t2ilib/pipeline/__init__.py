"""The whole way from a data set's server to pictures, as one file and one command: `t2ilib pipeline FILE`.

`file` is what people write, in the words of run files; `steps` is the dictionary of what can be done, each step a module; `marks` says what is
done and on what that depended; `running` goes through them. A step calls the functions that are under the commands `data download`, `train`
and `generate`, and nothing here trains or draws by itself. Leaves out comparing: seeds, statistics and reports are a study's.
"""
