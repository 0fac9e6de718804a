"""What is promised, and the tests that prove it: the rows of docs/reliability.md."""

from __future__ import annotations

from typing import NamedTuple

HERE = "tests/end_to_end/"


class Promise(NamedTuple):
    """A sentence that is true, and the tests (file::function) that would fail if it were not."""

    topic: str
    text: str
    tests: tuple[str, ...]


PROMISES = (
    Promise(
        "Exact resume",
        "A run stopped after any step and resumed leaves the bits of an unbroken one: weights, "
        "moments, losses, learning rates, validation losses, samples, metrics.jsonl. With "
        "accumulation, within an epoch and across its end, after skipped steps; float32, bfloat16.",
        (
            HERE + "test_resume.py::test_interrupted_at_any_step",
            HERE + "test_resume.py::test_interrupted_many_times",
            "tests/mantrans/training/test_training.py::test_a_resumed_run_has_the_bits_of_an_unbroken_one",
        ),
    ),
    Promise(
        "Exact resume",
        "The same from best.pt, and of a run that is already finished.",
        (
            HERE + "test_resume.py::test_from_the_best_checkpoint",
            HERE + "test_resume.py::test_a_finished_run_can_be_resumed",
        ),
    ),
    Promise(
        "Exact resume",
        "The same on a GPU, with the step captured as a CUDA graph.",
        ("tests/gpu/test_gpu_resume.py::test_a_resumed_run_has_the_bits_of_an_unbroken_one",),
    ),
    Promise(
        "Exact resume",
        "The same where memory would now allow more logits at a time: the checkpoint's stays.",
        (
            "tests/mantrans/training/test_training.py::test_a_resumed_run_computes_its_logits_as_before",
        ),
    ),
    Promise(
        "Exact resume",
        "A checkpoint of the first format is converted with every bit, and training goes on from "
        "it with the losses that the code of its time gave; configs and run folders are read.",
        (
            "tests/mantrans/checkpoint/test_first_format.py::"
            "test_training_goes_on_from_a_converted_checkpoint_with_the_losses_of_the_old_code",
            "tests/mantrans/checkpoint/test_first_format.py::"
            "test_a_converted_checkpoint_has_every_value_of_the_old_one",
            "tests/mantrans/checkpoint/test_first_format.py::"
            "test_the_run_folder_is_read_by_the_records_reader_and_the_report",
        ),
    ),
    Promise(
        "Exact resume",
        "A checkpoint is not loaded as another function of its weights, even if every shape fits: "
        "the field, what is expected and what was given are named.",
        (
            "tests/mantrans/training/test_step_refused.py::test_a_checkpoint_of_another_function_is_refused",
            "tests/end_to_end/test_file_contents.py::test_a_run_is_not_resumed_as_another_function",
        ),
    ),
    Promise(
        "Exact resume",
        "metrics.jsonl has every step once: no gap, no duplicate, no half line.",
        (
            HERE + "test_resume.py::test_every_step_and_every_validation_is_on_record_once",
            HERE + "test_crashes.py::test_a_kill_loses_no_record",
            "tests/mantrans/training/test_logger.py::test_an_interrupted_run_has_the_bytes_of_an_unbroken_one",
            "tests/mantrans/training/test_logger.py::test_a_resume_drops_later_records_and_a_line_cut_short",
            "tests/mantrans/training/test_logger.py::test_a_kill_loses_no_record",
        ),
    ),
    Promise(
        "Crashes",
        "Killed at random moments, many of them inside a save, and resumed each time: the final "
        "state is the unbroken run's.",
        (
            HERE + "test_crashes.py::test_killed_at_random_moments",
            HERE + "test_crashes.py::test_killed_between_the_names_of_a_checkpoint",
            "tests/mantrans/checkpoint/test_checkpoint.py::test_a_kill_inside_a_save_loses_nothing",
        ),
    ),
    Promise(
        "Crashes",
        "SIGTERM, SIGHUP, SIGUSR1 and Ctrl-C: the step is finished, the state saved, the way on is "
        "said; exit status 0, of Ctrl-C 130. A second one ends the process at once; the last "
        "checkpoint stays. A closed terminal's two hang-ups are one; ignored ones stay ignored.",
        (
            HERE + "test_crashes.py::test_a_signal_ends_the_step_saves_and_says_how_to_go_on",
            HERE + "test_crashes.py::test_a_second_signal_ends_even_a_save",
            "tests/mantrans/training/test_signals.py::test_a_closed_terminal_hangs_up_once",
            "tests/mantrans/training/test_signals.py::test_a_signal_that_is_ignored_stays_ignored",
            "tests/mantrans/training/test_training.py::test_sigterm_saves_and_says_how_to_go_on",
        ),
    ),
    Promise(
        "Crashes",
        "latest.pt is never absent once it has existed, and never anything but whole.",
        (HERE + "test_crashes.py::test_latest_is_never_absent",),
    ),
    Promise(
        "Corruption",
        "A flipped byte anywhere in a checkpoint, and a checkpoint cut short at any length, are "
        "found; the message has the file's name and what to do.",
        (
            HERE + "test_corruption.py::test_damage_to_a_runs_checkpoint_is_found",
            "tests/mantrans/checkpoint/test_checkpoint.py::test_a_flipped_bit_anywhere_is_detected",
            "tests/mantrans/checkpoint/test_checkpoint.py::test_truncation_at_any_length_is_detected",
            "tests/mantrans/checkpoint/test_checkpoint.py::test_blocks_of_zeros_and_swapped_blocks_are_detected",
            "tests/mantrans/checkpoint/test_checkpoint.py::test_a_damaged_tensor_is_named",
            "tests/mantrans/checkpoint/test_checkpoint.py::"
            "test_a_bad_sector_and_a_file_that_shrinks_are_said_in_one_line",
        ),
    ),
    Promise(
        "Corruption",
        "--resume latest takes the newest intact checkpoint and names those it passed over; with "
        "none intact it refuses instead of beginning anew.",
        (
            HERE + "test_corruption.py::test_the_newest_intact_checkpoint_is_taken",
            HERE + "test_corruption.py::test_a_run_goes_on_from_the_newest_intact_and_says_so",
            HERE + "test_corruption.py::test_with_nothing_intact_a_run_is_not_silently_begun_anew",
            "tests/mantrans/checkpoint/test_checkpoint.py::"
            "test_the_newest_intact_checkpoint_is_found_behind_damaged_ones",
        ),
    ),
    Promise(
        "Corruption",
        "Which checkpoint is newest, and which rotation removes, is decided by a counter inside "
        "the files: copies, moves and wrong clocks change nothing. Resuming from an older one sets "
        "the later ones aside, and says so; nothing newer is overwritten by something older.",
        (
            "tests/mantrans/checkpoint/test_order.py::test_times_do_not_decide",
            "tests/mantrans/checkpoint/test_order.py::test_rotation_removes_what_was_saved_first",
            "tests/mantrans/checkpoint/test_order.py::test_resuming_from_an_older_one_sets_the_later_ones_aside",
            "tests/mantrans/checkpoint/test_order.py::test_any_history_loses_nothing_newer",
            "tests/mantrans/checkpoint/test_order.py::"
            "test_files_from_before_the_counter_are_ordered_by_their_steps",
            "tests/end_to_end/test_run_names.py::"
            "test_from_an_older_checkpoint_the_records_and_the_rest_are_right",
        ),
    ),
    Promise(
        "Corruption",
        "The same damage to token files and tokenizer files is found, and the advice works.",
        (
            HERE + "test_corruption.py::test_damage_to_token_files_is_found",
            HERE + "test_corruption.py::test_damaged_tokens_and_tokenizers_stop_a_run_in_one_line",
            "tests/mantrans/data/test_shards.py::test_every_flipped_byte_is_found",
            "tests/mantrans/data/test_shards.py::test_every_truncation_and_every_surplus_is_found",
            "tests/mantrans/data/test_tokenizer.py::test_every_flipped_byte_and_truncation_is_found",
        ),
    ),
    Promise(
        "Disks",
        "On a full disk a periodic save fails with a warning and training goes on; a final save "
        "that fails ends in one line and status 2. What was saved before is intact.",
        (
            HERE + "test_disk.py::test_a_full_disk_costs_a_periodic_save_and_not_the_run",
            HERE + "test_disk.py::test_a_full_disk_under_the_records",
            HERE + "test_disk.py::test_a_file_size_limit_costs_saves_and_not_the_run",
            "tests/mantrans/checkpoint/test_checkpoint.py::test_a_full_disk_leaves_the_old_file_and_no_other",
            "tests/mantrans/checkpoint/test_checkpoint.py::test_a_really_full_disk",
            "tests/mantrans/training/test_logger.py::test_a_full_disk_makes_no_gap_and_is_said_once",
        ),
    ),
    Promise(
        "Disks",
        "Output that cannot be written (a full disk under the log, `| head`, a closed stream or "
        "terminal) is lost, and nothing else: a run trains, saves and reports as ever.",
        (
            HERE + "test_output.py::test_lost_output_costs_the_run_nothing",
            HERE + "test_output.py::test_a_mistake_has_its_status_without_output",
            HERE + "test_output.py::test_a_terminal_that_is_closed_costs_the_run_nothing",
            "tests/mantrans/training/test_console.py::test_a_command_whose_reader_has_gone_ends_quietly",
            "tests/mantrans/training/test_console.py::test_closed_streams_are_not_taken_by_files",
        ),
    ),
    Promise(
        "Disks",
        "A read-only disk or a folder without permission is refused before training; one that "
        "becomes so costs saves, not the run.",
        (
            HERE + "test_disk.py::test_a_read_only_disk_is_refused_before_training",
            HERE + "test_disk.py::test_a_folder_without_permission_is_refused_before_training",
            HERE + "test_disk.py::test_a_folder_that_loses_its_permission_keeps_what_was_saved",
        ),
    ),
    Promise(
        "Hostile files",
        "A checkpoint that would run code is refused by train.py and evaluate.py and runs nothing; "
        "the converter of one's own old files runs nothing either.",
        (
            HERE + "test_hostile.py::test_a_pickle_that_runs_code_is_refused_by_every_command",
            "tests/mantrans/checkpoint/test_checkpoint.py::test_a_pickle_that_would_run_code_is_refused",
            "tests/mantrans/checkpoint/test_checkpoint.py::test_a_mutated_header_gives_plain_data_or_is_refused",
        ),
    ),
    Promise(
        "Hostile files",
        "A file that claims more than it holds, 2^60 elements for one, is refused without "
        "allocating; an intact file with an odd state in it is used or refused, never a traceback.",
        (
            "tests/mantrans/checkpoint/test_checkpoint.py::test_claims_beyond_the_file_are_refused_without_allocating",
            "tests/mantrans/checkpoint/test_checkpoint.py::test_tensors_that_overlap_or_lie_askew_are_refused",
            "tests/mantrans/checkpoint/test_checkpoint.py::"
            "test_a_malformed_header_is_refused_in_little_time_and_memory",
            "tests/mantrans/checkpoint/test_checkpoint.py::"
            "test_a_header_longer_than_the_file_is_refused_before_it_is_read",
            "tests/mantrans/checkpoint/test_checkpoint.py::test_a_malformed_state_is_refused",
            "tests/mantrans/data/test_shards.py::test_a_hostile_header_is_refused",
            HERE + "test_hostile.py::"
            "test_a_model_that_claims_more_than_the_file_holds_takes_no_memory",
            HERE + "test_hostile.py::test_a_sound_file_with_an_odd_state_is_used_or_refused",
            HERE + "test_hostile.py::test_evaluation_uses_or_refuses_an_odd_state",
            HERE + "test_hostile.py::"
            "test_a_library_user_gets_a_model_or_one_line_and_keeps_what_he_has",
        ),
    ),
    Promise(
        "Hostile files",
        "A name of a run that leaves its folder is refused; a tokenizer of one's own may be "
        "anywhere. Names in a downloaded model folder stay in it; planted links are not written "
        "through.",
        (
            HERE + "test_hostile.py::test_names_that_leave_their_folder_are_refused",
            HERE + "test_hostile.py::test_a_link_in_the_checkpoint_folder_is_not_followed_out",
            "tests/mantrans/data/test_tokenizer.py::test_names_without_a_tokenizer_are_refused",
            "tests/mantrans/data/test_tokenizer.py::test_a_path_of_ones_own_may_climb",
            "tests/end_to_end/test_file_contents.py::test_an_index_names_only_readable_files_of_its_folder",
            "tests/mantrans/data/test_tokenizer.py::test_a_link_out_of_the_shipped_folder_is_refused",
        ),
    ),
    Promise(
        "Hostile files",
        "A FIFO, socket, device, folder or broken link where a run keeps a file is refused in a "
        "line before the first step, or replaced; nothing hangs.",
        (
            HERE + "test_planted.py::"
            "test_what_is_in_the_way_is_refused_before_the_first_step_or_replaced",
        ),
    ),
    Promise(
        "Hostile files",
        "A YAML alias bomb ends at once and in little memory; the source has no eval, no "
        "trust_remote_code, no unsafe YAML; nothing but the converter reads a pickle, as data.",
        (
            HERE + "test_hostile.py::test_a_yaml_alias_bomb_ends_quickly_and_in_little_memory",
            "tests/mantrans/config/test_config.py::test_an_alias_bomb_ends_at_once_and_in_little_memory",
            HERE + "test_hostile.py::test_the_source_runs_nothing_that_it_reads",
            HERE + "test_hostile.py::test_the_search_finds_what_it_looks_for",
        ),
    ),
    Promise(
        "Broken input",
        "Any configuration gives a run or one line that names the field, never a traceback.",
        (
            HERE + "test_broken_input.py::test_any_configuration_runs_or_is_refused_in_one_line",
            HERE + "test_broken_input.py::test_huge_values_are_refused_or_run",
            HERE + "test_broken_input.py::test_paths_that_cannot_be",
            "tests/mantrans/config/test_config.py::test_a_mutated_configuration_is_valid_or_refused_in_one_line",
            "tests/mantrans/config/test_config.py::test_any_text_is_yaml_or_refused_in_one_line",
            "tests/mantrans/config/test_config.py::test_any_override_is_applied_or_refused_in_one_line",
        ),
    ),
    Promise(
        "Broken input",
        "A number has the limits of the dtype in which it is used: what float32 rounds to 0, or to "
        "a limit that is not accepted, is refused; sampling succeeds with all that is accepted.",
        (
            "tests/mantrans/config/test_arguments.py::test_a_number_that_float32_rounds_to_0_is_refused",
            "tests/mantrans/config/test_arguments.py::"
            "test_a_number_that_float32_rounds_to_its_limit_is_refused",
            "tests/mantrans/config/test_arguments.py::test_sampling_cannot_fail",
        ),
    ),
    Promise(
        "Broken input",
        "A wrong argument of a library function is a ValueError or TypeError that names it, what "
        "is expected and what was given; a wrong option of a command is one line.",
        (
            "tests/mantrans/config/test_arguments.py::test_a_wrong_argument_is_named",
            "tests/mantrans/config/test_arguments.py::test_what_is_no_batch_of_token_ids_is_refused",
            "tests/mantrans/config/test_arguments.py::test_a_wrong_prompt_is_refused",
            "tests/end_to_end/test_commands.py::test_an_integer_out_of_range_is_one_line",
            "tests/end_to_end/test_commands.py::test_a_share_out_of_range_is_one_line",
        ),
    ),
    Promise(
        "Broken input",
        "Text that a command's output lacks is printed escaped, and input that is closed or no "
        "text is refused in one line.",
        (
            "tests/end_to_end/test_commands.py::test_text_that_the_output_lacks_is_printed_escaped",
            "tests/end_to_end/test_commands.py::test_encode_with_any_standard_streams",
        ),
    ),
    Promise(
        "Broken input",
        "Records, reports, indexes, tokenizers and configurations of any numbers, or nested any "
        "depth, are used or refused in one line.",
        (
            "tests/end_to_end/test_file_contents.py::test_records_that_cannot_be_parsed_are_passed_over",
            "tests/end_to_end/test_file_contents.py::test_files_that_cannot_be_parsed_are_refused_in_a_line",
            "tests/end_to_end/test_file_contents.py::test_a_figure_of_any_numbers_is_drawn",
            "tests/end_to_end/test_file_contents.py::test_a_page_of_any_numbers_is_written",
            "tests/end_to_end/test_file_contents.py::"
            "test_a_name_that_no_file_can_have_is_refused_by_every_reader",
        ),
    ),
    Promise(
        "Broken input",
        "Text that is empty, one byte, not UTF-8, with a byte order mark, CRLF or NUL, one line of "
        "100 MB, JSONL with broken lines (counted; skipped or refused as set).",
        (
            HERE + "test_broken_input.py::test_any_text_file_is_learnt_from_or_refused_in_one_line",
            HERE + "test_broken_input.py::test_a_line_of_100_megabytes",
            HERE + "test_broken_input.py::test_broken_lines_are_skipped_or_refused_as_set",
            "tests/mantrans/data/test_text.py::test_unusual_text_files",
            "tests/mantrans/data/test_text.py::test_text_that_is_not_utf8_is_refused_with_its_place",
            "tests/mantrans/data/test_text.py::test_broken_lines_are_counted_or_refused",
        ),
    ),
    Promise(
        "Broken input",
        "A tokenizer with missing or extra tokens is refused, and one that is not the "
        "checkpoint's; token ids out of range reach no index.",
        (
            HERE + "test_broken_input.py::test_a_tokenizer_with_missing_or_extra_tokens_is_refused",
            HERE + "test_broken_input.py::"
            "test_a_consistent_tokenizer_of_another_size_cannot_continue_a_run",
            HERE + "test_hostile.py::test_token_ids_beyond_a_models_vocabulary_reach_no_index",
            "tests/mantrans/data/test_tokenizer.py::test_a_tokenizer_that_is_not_lossless_is_refused",
            "tests/mantrans/data/test_shards.py::test_a_token_outside_the_vocabulary_is_refused",
        ),
    ),
    Promise(
        "Broken input",
        "What is no UTF-8 text is refused by its kind: UTF-16 and UTF-32 with or without a mark, "
        "archives, PDF, binary data, with the command that converts it where there is one; pipes "
        "and devices too. Text in .gz and .zst is read.",
        (
            "tests/mantrans/data/test_files.py::"
            "test_utf16_and_utf32_are_named_and_the_command_converts_them",
            "tests/mantrans/data/test_files.py::test_what_is_no_text_is_named_with_what_to_do",
            "tests/mantrans/data/test_files.py::test_what_is_no_file_is_refused_as_what_it_is",
            "tests/mantrans/data/test_files.py::test_compressed_text_is_read_as_it_is",
            "tests/mantrans/data/test_files.py::test_damaged_compressed_text_is_refused_in_one_line",
        ),
    ),
    Promise(
        "Broken input",
        "Of Parquet only the column of text is read, whatever the others are; another type is "
        "refused by its name, empty parts pass. A blank line is Unicode's, whatever ends it.",
        (
            "tests/mantrans/data/test_parquet.py::test_other_columns_do_not_matter",
            "tests/mantrans/data/test_parquet.py::test_a_column_of_another_type_is_refused_by_its_name",
            "tests/mantrans/data/test_parquet.py::test_empty_parts_and_parts_without_text_pass",
            "tests/mantrans/data/test_text.py::test_a_blank_line_is_unicodes",
        ),
    ),
    Promise(
        "Broken input",
        "A warm-up or decay that does not fit into the run is refused, whether its length is given "
        "in steps or in epochs.",
        ("tests/mantrans/data/test_resume.py::test_a_schedule_longer_than_the_epochs_is_refused",),
    ),
    Promise(
        "All of the text",
        "Every token but the first is a target in any two successive epochs, for any length of "
        "text and sequence; a run begun by an earlier rule goes on with its own batches.",
        (
            "tests/mantrans/data/test_loader.py::test_any_two_successive_epochs_have_every_target",
            "tests/mantrans/data/test_loader.py::test_every_epoch_has_every_window_once",
            "tests/mantrans/data/test_loader.py::test_a_run_of_the_first_rule_keeps_its_batches",
            "tests/mantrans/data/test_resume.py::"
            "test_a_run_begun_before_there_was_a_record_goes_on_with_its_batches",
        ),
    ),
    Promise(
        "All of the text",
        "Each start says how many documents and bytes are used, of how many, and what was skipped: "
        "rows without text, files of other kinds. One's own text is used whole under any shipped "
        "configuration; linked folders are read, each once.",
        (
            "tests/mantrans/data/test_dataset.py::test_what_is_used_of_how_much_is_known_at_each_start",
            "tests/mantrans/data/test_parquet.py::test_what_was_skipped_is_said_at_each_start",
            "tests/mantrans/data/test_parquet.py::test_rows_without_text_are_counted_or_refused_as_set",
            "tests/mantrans/config/test_config.py::"
            "test_ones_own_text_is_used_whole_under_any_shipped_configuration",
            "tests/mantrans/data/test_files.py::test_linked_folders_are_followed_once_and_said",
        ),
    ),
    Promise(
        "All of the text",
        "A run goes on with other tokens than its checkpoint's only where that is asked for; a "
        "text to validate on is never trained on.",
        (
            "tests/mantrans/data/test_resume.py::test_other_tokens_than_the_checkpoints_are_refused",
            "tests/mantrans/data/test_resume.py::test_the_same_tokens_under_another_name_are_the_same",
            "tests/mantrans/data/test_dataset.py::test_files_to_validate_on_are_never_trained_on",
        ),
    ),
    Promise(
        "Numerical trouble",
        "NaN or infinity in weights, gradients or loss: the step is skipped, weights and moments "
        "keep their bits, it is counted and reported.",
        (
            HERE + "test_numerics.py::test_a_bad_step_changes_nothing_and_is_counted",
            "tests/mantrans/training/test_step_refused.py::test_a_step_that_is_not_finite_changes_nothing",
            "tests/kernels/test_triton_training.py::test_a_step_that_is_not_finite_changes_nothing",
            "tests/mantrans/training/test_step.py::test_a_step_that_is_not_finite_is_skipped_and_counted",
        ),
    ),
    Promise(
        "Numerical trouble",
        "A learning rate or norm that cannot be is refused at the door. A batch without targets "
        "changes nothing at all, is `ok`, and is a line in the log.",
        (
            "tests/mantrans/training/test_step_refused.py::test_a_rate_that_cannot_be_is_refused_at_the_door",
            "tests/mantrans/training/test_step_refused.py::"
            "test_plain_descent_along_a_gradient_that_is_not_finite_changes_nothing",
            "tests/mantrans/training/test_step_refused.py::test_a_batch_without_targets_changes_nothing_and_is_logged",
            "tests/mantrans/training/test_step_refused.py::test_a_training_step_without_targets_changes_nothing",
        ),
    ),
    Promise(
        "Numerical trouble",
        "max_consecutive_skips, counted across a resume, stop the run with a good checkpoint; "
        "broken weights are never saved; good ones are, whatever the last step was.",
        (
            HERE + "test_numerics.py::test_too_many_in_a_row_end_the_run",
            HERE + "test_numerics.py::test_the_count_in_a_row_goes_on_after_a_resume",
            HERE + "test_numerics.py::test_broken_weights_never_replace_a_good_checkpoint",
            HERE + "test_numerics.py::test_a_run_whose_last_step_is_bad_is_saved_all_the_same",
            "tests/mantrans/training/test_training.py::test_steps_that_are_not_finite_end_the_run_with_a_report",
        ),
    ),
    Promise(
        "Numerical trouble",
        "--debug-nan stops at once and names the first layer whose output is not finite.",
        (
            HERE + "test_numerics.py::test_debug_nan_names_the_first_layer",
            "tests/mantrans/training/test_training.py::test_debug_nan_stops_at_once_and_names_the_layer",
        ),
    ),
    Promise(
        "Numerical trouble",
        "The outlier guard skips what is far above its window; the window is saved and resumed.",
        (
            HERE + "test_numerics.py::test_the_outlier_guard_decides_alike_after_a_resume",
            HERE + "test_numerics.py::test_another_outlier_window_begins_empty_and_says_so",
            "tests/mantrans/training/test_step.py::"
            "test_outlier_guard_refuses_what_is_far_above_and_learns_a_new_level",
            "tests/mantrans/training/test_step.py::test_outlier_guard_does_not_take_a_rounding_for_an_outlier",
        ),
    ),
    Promise(
        "Numerical trouble",
        "A model whose logits are not finite draws nothing: generation and both commands end in "
        "one line, at temperature 0 too; a run finishes without samples, and says so.",
        (
            "tests/mantrans/inference/test_generation_edges.py::test_a_broken_model_speaks_up_when_it_generates",
            "tests/mantrans/inference/test_generation_edges.py::test_commands_end_in_one_line_for_a_broken_checkpoint",
            "tests/mantrans/inference/test_generation_edges.py::test_a_run_whose_model_gives_no_samples_ends_well",
        ),
    ),
    Promise(
        "Load",
        "Over 20,000 steps resident memory and open files stay flat, and no line is missing.",
        (HERE + "test_load.py::test_memory_and_open_files_stay_flat",),
    ),
    Promise(
        "Load",
        "A run whose step, validation or samples do not fit into the free memory is refused with "
        "both numbers; a container's limit counts.",
        (
            "tests/mantrans/training/test_memory.py::test_each_size_is_refused_where_it_no_longer_fits",
            "tests/mantrans/training/test_memory.py::test_batches_of_evaluation_are_refused_too",
            "tests/mantrans/training/test_memory.py::test_a_step_takes_no_more_than_is_counted",
            "tests/mantrans/training/test_memory.py::test_available_memory_is_the_least_of_system_and_groups",
        ),
    ),
    Promise(
        "Load",
        "A second process on a run's folder, or on its checkpoints, is refused; a dead one leaves "
        "no lock. Runs of other names share folders undisturbed.",
        (
            HERE + "test_load.py::test_two_processes_on_one_run",
            HERE + "test_load.py::test_runs_of_other_names_share_folders",
            "tests/mantrans/checkpoint/test_checkpoint.py::"
            "test_a_second_process_is_refused_and_a_dead_one_leaves_no_lock",
        ),
    ),
    Promise(
        "Names",
        "A second run of a name keeps the first one whole, as NAME.1 (NAME.2, …), and says so; "
        "another run's checkpoint does not go on over it; restarted by torchrun a run goes on.",
        (
            "tests/end_to_end/test_run_names.py::test_a_second_run_keeps_the_first_whole",
            "tests/end_to_end/test_run_names.py::test_the_number_is_free_in_both_places",
            "tests/end_to_end/test_run_names.py::test_another_runs_checkpoint_does_not_go_on_over_this_run",
            "tests/end_to_end/test_run_names.py::test_restarted_by_torchrun_it_goes_on",
        ),
    ),
    Promise(
        "Names",
        "A start that is refused leaves no file behind and moves none; a resume is refused before "
        "anything is tokenized. A blank argument, an unset variable's, is refused.",
        (
            "tests/end_to_end/test_run_names.py::test_a_refused_start_leaves_everything_as_it_was",
            "tests/end_to_end/test_run_names.py::test_a_resume_is_refused_before_anything_is_tokenized",
            "tests/mantrans/test_cli_blank_arguments.py::test_a_blank_argument_is_refused",
        ),
    ),
    Promise(
        "Names",
        "--resume takes a run's name, its folders or a checkpoint, and then its own settings; a "
        "learning rate that jumps is announced.",
        (
            "tests/end_to_end/test_run_names.py::"
            "test_a_run_is_resumed_by_any_of_its_names_with_its_own_settings",
            "tests/end_to_end/test_run_names.py::test_a_moved_run_goes_on_where_it_is_now",
            "tests/end_to_end/test_run_names.py::test_a_jump_of_the_learning_rate_is_announced",
        ),
    ),
    Promise(
        "Evaluation",
        "A text of one's own is measured whole, every token once, from the checkpoint and its "
        "tokenizer alone; samples need no data. A prompt that leaves no room is said.",
        (
            "tests/mantrans/evaluation/test_evaluation.py::test_a_text_of_ones_own_is_measured_whole_and_needs_no_data",
            "tests/mantrans/evaluation/test_evaluation.py::test_samples_need_no_data",
            "tests/mantrans/evaluation/test_evaluation.py::test_a_text_that_cannot_be_measured_is_refused_in_a_line",
            "tests/mantrans/evaluation/test_evaluation.py::test_a_prompt_without_room_is_said",
        ),
    ),
    Promise(
        "Evaluation",
        "Runs of several tokenizers are compared by bits per byte only, and the page says what "
        "differs between them.",
        (
            "tests/mantrans/report/test_report.py::test_runs_of_several_tokenizers_are_compared_by_bits_per_byte",
        ),
    ),
    Promise(
        "Evaluation",
        "Decoding on a CPU has the reference's exactness in every dtype, for rows of equal and "
        "unequal length, and reads nothing that was never written.",
        (
            "tests/kernels/test_operations.py::"
            "test_native_decoding_is_as_exact_as_the_reference_and_does_not_go_by_it",
        ),
    ),
    Promise(
        "Own text",
        "The README's commands lead from a text of one's own to a tokenizer, a trained and resumed "
        "model, its measure and its words; so they do outside the clone.",
        (
            "tests/end_to_end/test_use_own_text.py::test_the_readmes_commands_for_a_text_of_ones_own",
            "tests/end_to_end/test_wheel.py::test_a_text_of_ones_own_is_learnt_outside_the_clone",
        ),
    ),
    Promise(
        "Own text",
        "A model saved with its tokenizer is loaded by transformers' Auto classes.",
        (
            "tests/mantrans/interop/test_interop.py::test_the_tokenizer_goes_along_and_transformers_loads_both",
        ),
    ),
    Promise(
        "Reproducibility",
        "The same seed gives the same bits, in one process and in another.",
        (
            HERE + "test_reproducibility.py::test_the_same_seed_gives_the_same_bits",
            HERE + "test_reproducibility.py::test_another_seed_gives_other_bits",
        ),
    ),
    Promise(
        "Reproducibility",
        "The golden loss curve of 100 float32 steps: within a bound everywhere, exact where the "
        "processor, PyTorch and the number of threads are on record.",
        (
            HERE + "test_reproducibility.py::test_the_golden_curve",
            HERE + "test_reproducibility.py::test_the_golden_curve_with_two_threads",
        ),
    ),
)
