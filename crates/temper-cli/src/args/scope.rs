//! What an option of a verb that trains decides.

/// What an option decides; the options that it stands for are [`Scope::of`]'s.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// The numbers of a run: equal when it goes on.
    Numbers,
    /// Where something lies. What it holds is hashed, and must be equal.
    Path,
    /// When something happens in a run, or in which form: may change when it goes on, but is equal on all ranks.
    Course,
    /// What one process does or says.
    Process,
}

impl Scope {
    /// That of an option, by its name in snake case.
    pub fn of(option: &str) -> Scope {
        match option {
            "adapter" | "chat_template" | "config" | "config_model" | "data" | "eval_data" | "model"
            | "out" | "reference" => Scope::Path,
            "eval_steps"
            | "parallel"
            | "sample_max_new_tokens"
            | "sample_steps"
            | "save_dtype"
            | "save_steps"
            | "stop_after" => Scope::Course,
            "json" | "keep" | "log_to" | "quiet" | "sample_prompts" | "threads" => Scope::Process,
            _ => Scope::Numbers,
        }
    }

    /// Whether it changes no number, whatever it is.
    pub fn is_free(self) -> bool {
        matches!(self, Scope::Course | Scope::Process)
    }
}
